"""Measure trained models: sharpness, Hessian, loss landscapes, the estimate of the gradient."""
