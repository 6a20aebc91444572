"""Reports: plots as SVG, and atomic files."""
