"""The pictures of the course: each file computes the numbers of one picture and draws them."""
