"""Jobs on Kubernetes: the objects, checks of the cluster, and the state of a job."""
