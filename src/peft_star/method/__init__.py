"""The paper's method, one operation a file."""
