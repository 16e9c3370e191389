"""What has to be known of a base model: where its FFNs are, how its weights are read, whose they are."""
