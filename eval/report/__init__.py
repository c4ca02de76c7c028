"""From what was measured to the report: assembling, verdict, page, card, comparison and exports."""
