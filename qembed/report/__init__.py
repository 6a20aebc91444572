"""Reports: plots as SVG, and files that are written whole."""
