"""Data files as people have them: paths, encodings, formats, column names, rejected records, held-out records."""
