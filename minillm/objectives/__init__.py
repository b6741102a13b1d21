"""What stands between a batch and its loss: references, teachers, a student's own answers."""
