"""Whether a run would work here: what is wrong with a machine, an allocation or a job before anything is started."""
