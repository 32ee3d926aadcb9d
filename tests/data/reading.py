"""Reads documents like `prepare`, for the tests of input formats."""

from dualsm.data import inputs, readers

TEXTS = ["first", "  second\twith tab", "third 🙂\nand a line", "naïve \x00"]


def read(pattern, text_key="text", max_bytes=1 << 20, tokenizer="", divide=False, **options) -> list[str]:
    """Returns the texts of all documents; for unusable documents, the kind of fault in angle brackets.

    `options` are further arguments of `read_blocks`.
    """
    found = []
    for path in inputs.find_inputs(str(pattern), file_format=options.get("file_format", "auto")):
        for block in readers.read_blocks(path, text_key, max_bytes, divide, **options):
            assert block.first == sum(1 for text in found if text[0] == path) + 1
            for item in block.items:
                if readers.is_blank(item, block.form):
                    found.append((path, ""))
                    continue
                try:
                    found.append((path, readers.parse(item, block.form, text_key, tokenizer)))
                except readers.Fault as fault:
                    found.append((path, f"<{fault.kind}>" + f" x{fault.documents}" * (fault.documents > 1)))
    return [text for _, text in found if text]
