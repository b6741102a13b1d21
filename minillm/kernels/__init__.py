"""Faster bodies of plain expressions; they import nothing but torch and each other."""
