"""The commands of `bll`: options and main of each."""
