"""Renderers of result objects: terminal (rich), JSON, HTML (plotly). They compute nothing that is not in a result."""
