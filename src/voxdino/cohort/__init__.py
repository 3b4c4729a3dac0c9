"""Many cases over many processes: on this machine or on a Ray cluster. A lost worker's cases go elsewhere."""
