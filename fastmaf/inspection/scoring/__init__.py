"""From a flow to a score map, an image score and an anomaly map."""
