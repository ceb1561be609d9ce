"""The verbs, one a file; `quantlab.cli.app.VERBS` names them."""
