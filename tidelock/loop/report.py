"""Report."""
import json
def write_report(data, directory):
    (directory/"report.json").write_text(json.dumps(data, indent=1))
