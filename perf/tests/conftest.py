import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for truth_target, which workers load by its path
