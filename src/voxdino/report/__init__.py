"""Reports: what a page says (page), how it is drawn (html, charts), and the same tables as files (tables, write)."""
