"""What frozen features say: neighbours, linear and attentive probes, patches, retrieval, matching."""
