"""Scripts beside the application, which does not import them."""
