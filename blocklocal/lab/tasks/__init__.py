"""Tasks of `bll train`: images, text, tables. Each knows its data, its batches and its models."""
