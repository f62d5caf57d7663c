"""Terms that are exotic, or whose rule is partly our reading of a publication.  They meet the same contract as those of ``posttrain.loss``."""
