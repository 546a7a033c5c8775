"""What trains a detector in any framework: the loop, its run folder, replicas, evaluation."""
