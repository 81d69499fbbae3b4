"""Renderers of result objects: terminal (rich), JSON, HTML (jinja2, plotly). They compute nothing that no result has."""
