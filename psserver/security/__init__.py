"""Who may do what on this server: credentials, policy, budgets and the audit log.

verbs.py         the verbs of a policy, and the rights that each gRPC method needs
budgets.py       limit the requests and bytes of one principal
policy.py        read a policy: principals, their credentials, rights and budgets
audit.py         write a line for each change and each refused attempt
policyfile.py    read the policy file again when it changes
pem.py           read certificates and private keys in the format PEM
certificates.py  the server's TLS certificates, read again when their files change
httptoken.py     protect the HTTP port with a token
guard.py         find out who calls, and refuse what the policy does not allow
"""
