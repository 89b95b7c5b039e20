"""The study page: one HTML file about one or several runs, which a browser opens from disk."""
