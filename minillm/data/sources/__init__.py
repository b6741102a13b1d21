"""Other people's files: encodings, layouts, keys, rejected records, what is held out."""
