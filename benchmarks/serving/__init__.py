"""What serve.py and serve_many.py have in common. No benchmark by itself."""
