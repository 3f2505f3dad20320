"""The SimNPO paper's experiment on mixtures of Markov chains (arXiv 2410.07163): short samples, and an unseen part."""
