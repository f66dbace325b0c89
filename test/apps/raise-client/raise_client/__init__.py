"""Its client app raises for one partition in one round; FedAvg goes on with the others."""
