"""Keys and certificates for localhost, made with openssl."""

import subprocess


def make_certificate(directory, name, days=30, issuer=None):
    """A key and a certificate; signed by itself, or by the `issuer` made before. With an issuer, `days` may be negative: expired."""
    key, cert = directory / f"{name}.key", directory / f"{name}.pem"
    extensions = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    command = ["openssl", "req", "-x509" if issuer is None else "-new", "-newkey", "ec", "-pkeyopt",
               "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key, "-subj", f"/CN={name}", "-addext", extensions]
    if issuer is None:
        command += ["-out", cert, "-days", days]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    else:
        request = directory / f"{name}.csr"
        subprocess.run(list(map(str, command + ["-out", request])), check=True, capture_output=True)
        subprocess.run(list(map(str, ["openssl", "x509", "-req", "-in", request, "-CA", directory / f"{issuer}.pem", "-CAkey",
                                      directory / f"{issuer}.key", "-CAcreateserial", "-copy_extensions", "copy", "-out", cert, "-days",
                                      days])), check=True, capture_output=True)
    return key, cert
