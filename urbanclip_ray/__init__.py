"""urbanclip_ray: a Ray-distributed trainer for text-enhanced urban region profiling."""
