"""Training: one loop for every stage, and one function for each thing that is easy to get wrong."""
