"""Optional callbacks that look on while a fit trains."""
