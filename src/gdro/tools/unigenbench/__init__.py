"""UniGenBench: 600 prompts with test points, four images each, and a vision-language judge (arXiv 2508.20751)."""
