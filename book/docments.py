"""nbdev's docments (a comment after each parameter) as fields of an API page."""
import ast
import inspect
import io
import re
import sys
import textwrap
import tokenize

SECTION = re.compile(r"^(?:(Raises|Returns|Source)\b\s*:?|(Errors|Sources|Note|Shape|Example)\s*:)(?:\s+|$)")
SHAPE = re.compile(r"^((?:\([^()]*\)|(?:\w+ )?\(\))(?=[\s,;:.]|$))")
CODE_OR_MATH = re.compile(r"(``?)(?P<code>.+?)\1|\$(?P<math>[^$]+?)\$")


def rst(text):
    """One line of our docstrings (Markdown's backticks, $math$, plain text) in reStructuredText."""
    out, end = [], 0
    for match in CODE_OR_MATH.finditer(text):
        out.append(re.sub(r"([\\*_|`])", r"\\\1", text[end : match.start()]))
        # The escaped space lets a letter follow directly: `x`s.
        out.append(f"\\ ``{match['code']}``\\ " if match["code"] else f"\\ :math:`{match['math']}`\\ ")
        end = match.end()
    out.append(re.sub(r"([\\*_|`])", r"\\\1", text[end:]))
    return "".join(out)


def with_shape(comment):
    """A comment whose leading shape is set as code: `(T, B, I) input sequence`."""
    match = SHAPE.match(comment)
    return f"``{match[1]}``{rst(comment[match.end():])}" if match else rst(comment)


def comments_by_line(source):
    """`{line: comment}` and the set of lines that hold nothing but a comment."""
    comments, alone = {}, set()
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0]] = token.string.lstrip("#").strip()
                if not token.line[: token.start[1]].strip():
                    alone.add(token.start[0])
    except (tokenize.TokenError, IndentationError):  # the tail of a source that inspect cut short
        pass
    return comments, alone


def docments(obj):
    """`{name: comment}` of a function's parameters or a data class's fields, and of `return`."""
    if inspect.isclass(obj) and "__init__" in vars(obj) and not hasattr(obj, "__dataclass_fields__"):
        obj = obj.__init__
    try:
        source = textwrap.dedent(inspect.getsource(obj))
        node = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return {}
    comments, alone = comments_by_line(source)

    def comment_of(line, previous):
        """The comment behind the line or, where there is none, the lines of comment above it."""
        if line in comments and line not in alone:
            return comments[line]
        above = []
        while (line := line - 1) in alone and line > previous:
            above.insert(0, comments[line])
        return " ".join(above)

    if isinstance(node, ast.ClassDef):
        named = [(item.target.id, item.end_lineno) for item in node.body if isinstance(item, ast.AnnAssign)]
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
        stars = {arguments.vararg: "*", arguments.kwarg: "**"}
        # A default that spans lines ends later than its argument; the comment stands at its end.
        defaults = dict(zip(reversed([*arguments.posonlyargs, *arguments.args]), reversed(arguments.defaults)))
        defaults.update(zip(arguments.kwonlyargs, arguments.kw_defaults))
        named = [
            (stars.get(arg, "") + arg.arg, max(arg.end_lineno, getattr(defaults.get(arg), "end_lineno", 0)))
            for arg in every
            if arg is not None and arg.arg not in ("self", "cls")
        ]
        if node.returns:
            named.append(("return", node.returns.end_lineno))
    else:
        return {}
    found, previous, by_line = {}, 0, {}
    for name, line in named:
        by_line.setdefault(line, []).append(name)
    for line, names in by_line.items():
        if comment := comment_of(line, previous):
            # A comment behind `x, y` says something of both, but not of what is returned.
            returned = "return" in names and len(names) > 1
            found["return" if returned or names == ["return"] else ", ".join(names)] = comment
        previous = line
    return found


def public_name(cls):
    """The shortest path under which a class can be imported: `torch.nn.Module`, not `torch.nn.modules.module.Module`."""
    path = cls.__module__.split(".")
    for length in range(1, len(path) + 1):
        module = ".".join(path[:length])
        if getattr(sys.modules.get(module), cls.__name__, None) is cls:
            return cls.__name__ if module == "builtins" else f"{module}.{cls.__name__}"
    return cls.__qualname__


def api_lines(lines, obj):
    """A docstring's lines, in reStructuredText and with the docments as fields below."""
    body, fields, field = [], [], None
    for number, line in enumerate(lines):
        match = SECTION.match(line) if number else None
        if match:
            field = [(match[1] or match[2]), line[match.end() :].strip()]
            fields.append(field)
        elif field is not None and line.strip():
            field[1] = f"{field[1]} {line.strip()}".strip()
        elif field is not None:
            field = None
        elif line.lstrip().startswith((">>>", "...")) or (body and body[-1].lstrip().startswith(">>>") and line.strip()):
            body.append(line)
        else:
            body.append(re.sub(r"^(\s*(?:[-+]\s)?)(.*)$", lambda m: m[1] + rst(m[2]), line))
    notes = docments(obj)
    returned = notes.pop("return", None)
    rows = [f":param {name.replace('*', chr(92) + '*')}: {with_shape(comment)}" for name, comment in notes.items()]
    if returned:
        rows.append(f":returns: {with_shape(returned)}")
    if inspect.isclass(obj) and (bases := [public_name(base) for base in obj.__bases__ if base is not object]):
        rows.append(f":Base: {', '.join(f'``{base}``' for base in bases)}")
    names = {"Errors": "Raises", "Sources": "Source"}
    rows += [f":{names.get(name, name)}: {with_shape(text)}" for name, text in fields]
    while body and not body[-1].strip():
        body.pop()
    return [*body, "", *rows, ""]
