"""Jobs on Kubernetes: the objects, what the cluster lacks, and what it says of them."""
