"""The NPO paper's logistic experiment (arXiv 2404.05868, section 4 and appendix D), and its rate of collapse."""
