"""How much of the model is left: fidelity to the float model and accuracy on tasks."""
