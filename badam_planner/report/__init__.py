"""Renderers of result objects: terminal (rich), JSON, HTML (jinja2, plotly). They compute nothing new."""
