"""HTML reports, charts and plots."""
