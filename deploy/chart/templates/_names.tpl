{{/* Labels by which all selectors find the pods of this release. */}}
{{- define "ps.selector" -}}
app.kubernetes.io/name: embedding-ps
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Name, namespace and label of an object of this release. */}}
{{- define "ps.metadata" -}}
name: {{ .Release.Name }}
namespace: {{ .Release.Namespace }}
labels:
  app.kubernetes.io/part-of: embedding-ps
{{- end }}

{{/* The file psserver.toml of the kustomize base, with the values shards, checkpoints.url and
     settings. */}}
{{- define "ps.config" -}}
{{- $shards := printf "shards = %d" (int .Values.shards) -}}
{{- $url := .Values.checkpoints.url | default "file:///checkpoints" | toJson -}}
{{- $file := .Files.Get "files/psserver.toml" -}}
{{- $file = regexReplaceAll "(?m)^shards = [0-9]+" $file $shards -}}
{{- $file | replace "\"file:///checkpoints\"" $url -}}
{{- with .Values.settings }}{{ toToml . }}{{ end -}}
{{- end }}

{{/* Name of the ConfigMap. It ends with the hash that kustomize computes, so that a changed file
     has a new name, which restarts the pods one after the other. */}}
{{- define "ps.configName" -}}
{{- $name := printf "%s-config" .Release.Name -}}
{{- $data := dict "psserver.toml" (include "ps.config" .) -}}
{{- $hash := dict "kind" "ConfigMap" "name" "" "data" $data | toJson | sha256sum | trunc 10 -}}
{{- $hash = $hash | replace "0" "g" | replace "1" "h" | replace "3" "k" -}}
{{- printf "%s-%s" $name ($hash | replace "a" "m" | replace "e" "t") -}}
{{- end }}
