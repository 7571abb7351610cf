"""What a JobSet (jobset.x-k8s.io/v1alpha2) may look like, as far as a training job uses it; a JSON schema.

Written after the API's public types: JobSet's own fields, those of batch/v1 Job and of core/v1 Pod. Unknown fields are
errors at every level, as the API server has it with strict validation. What we never use is left out.
"""

TEXT, NUMBER = {"type": "string"}, {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
FLAG = {"type": "boolean"}
MAP = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITIES = {"type": "object", "additionalProperties": {"type": ["integer", "string"]}}


def thing(required: str = "", **fields: dict) -> dict:
    """An object with these fields and no others."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def some(item: dict, least: int = 0) -> dict:
    """A list."""
    return {"type": "array", "items": item, "minItems": least}


def one_of(*values: str) -> dict:
    """One of several words."""
    return {"enum": list(values)}


META = thing(name=NAME, namespace=NAME, labels=MAP, annotations=MAP)

CONTAINER = thing(
    "name image",
    name=NAME,
    image=TEXT,
    command=some(TEXT),
    args=some(TEXT),
    workingDir=TEXT,
    env=some(thing("name", name=TEXT, value=TEXT)),
    ports=some(thing("containerPort", containerPort=NUMBER, name=NAME)),
    resources=thing(limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=some(thing("name mountPath", name=NAME, mountPath=TEXT, readOnly=FLAG, subPath=TEXT)),
)

POD = thing(
    "containers restartPolicy",
    containers=some(CONTAINER, 1),
    restartPolicy=one_of("Never", "OnFailure"),  # a Job's pods may not have Always
    terminationGracePeriodSeconds=NUMBER,
    nodeSelector=MAP,
    serviceAccountName=NAME,
    hostNetwork=FLAG,
    tolerations=some(thing(key=TEXT, operator=one_of("Exists", "Equal"), value=TEXT, effect=TEXT)),
    volumes=some(
        thing(
            "name",
            name=NAME,
            persistentVolumeClaim=thing("claimName", claimName=NAME, readOnly=FLAG),
            emptyDir=thing(medium=TEXT, sizeLimit=TEXT),
        )
    ),
)

POD_FAILURE_RULE = thing(
    "action",
    action=one_of("FailJob", "FailIndex", "Ignore", "Count"),
    onExitCodes=thing(
        "operator values", containerName=NAME, operator=one_of("In", "NotIn"), values=some({"type": "integer"}, 1)
    ),
    onPodConditions=some(thing("type", type=TEXT, status=one_of("True", "False", "Unknown"))),
)

JOB = thing(
    "template",
    parallelism=NUMBER,
    completions=NUMBER,
    completionMode=one_of("Indexed", "NonIndexed"),
    backoffLimit=NUMBER,
    activeDeadlineSeconds=NUMBER,
    podFailurePolicy=thing("rules", rules=some(POD_FAILURE_RULE)),
    template=thing("spec", metadata=META, spec=POD),
)

FAILURE_RULE = thing(
    "name action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action=one_of(
        "FailJobSet",
        "RestartJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
        "RestartJob",
        "RestartJobAndIgnoreMaxRestarts",
    ),
    onJobFailureReasons={**some(TEXT), "uniqueItems": True},
    onJobFailureMessagePatterns={**some(TEXT), "uniqueItems": True},
    targetReplicatedJobs=some(NAME),
)

JOBSET = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **thing(
        "apiVersion kind metadata spec",
        apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
        kind={"const": "JobSet"},
        metadata={**META, "required": ["name"]},
        spec=thing(
            "replicatedJobs",
            suspend=FLAG,
            ttlSecondsAfterFinished=NUMBER,
            network=thing(enableDNSHostnames=FLAG, subdomain=NAME, publishNotReadyAddresses=FLAG),
            successPolicy=thing("operator", operator=one_of("All", "Any"), targetReplicatedJobs=some(NAME)),
            failurePolicy=thing(
                maxRestarts=NUMBER,
                restartStrategy=one_of("Recreate", "BlockingRecreate", "InPlaceRestart"),
                rules=some(FAILURE_RULE),
            ),
            replicatedJobs=some(
                thing("name template", name=NAME, replicas=NUMBER, template=thing("spec", metadata=META, spec=JOB)), 1
            ),
        ),
    ),
}
