"""Encoders times data sets: frozen probes on cached features, honest tables, a page that says where they fail."""
