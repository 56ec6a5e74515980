"""The command `bll`: data, models, training runs. Needs the extra `blocklocal[lab]`."""
