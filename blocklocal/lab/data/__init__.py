"""Images and labels: where they come from, how they are read and put into batches."""
