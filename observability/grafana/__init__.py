"""Grafana's dashboards, made of one description: `python -m observability.grafana` writes dashboards/*.json."""
