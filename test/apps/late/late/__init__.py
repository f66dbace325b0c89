"""From its second round on it waits for all of its clients."""
