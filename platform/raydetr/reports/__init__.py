"""HTML reports, charts and plots.

`page` is the report of an evaluation and `page_comparison` that of two models; their images carry boxes and masks as
SVG (`page_overlay`). `data_report` is the report of an ingest, whose sample images are drawn by `detr.drawing`.
`run_pictures` has the contact sheet and the plots of a run.
"""
