"""Several processes: ranks, and the engines that make one gradient of theirs."""
