"""What a run says of itself once one looks back: a page, its plots as files, and the curves as JSON."""
