"""Prompt learning by running it: 51 papers explained, implemented and tested."""
import warnings

__version__ = "0.1.0"

# tqdm warns in every notebook that has no ipywidgets; its plain text bar is all we want
warnings.filterwarnings("ignore", message="IProgress not found")
